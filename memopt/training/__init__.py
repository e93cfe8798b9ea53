"""Around the step: param groups, rates and schedules, clipping, the optimizer in backward."""
