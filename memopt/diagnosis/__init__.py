"""What a run looks like from the optimizer: cheap measurements every few steps, and what they mean."""

from memopt.diagnosis.rates import RangeTest, range_test
from memopt.diagnosis.readings import Finding, GroupReading, MomentReading, Reading
from memopt.diagnosis.watching import Watch, watch

__all__ = ["Finding", "GroupReading", "MomentReading", "RangeTest", "Reading", "Watch", "range_test", "watch"]
