"""Tensor, pipeline, context and expert parallelism, and replicas of shards: what one of many ranks holds."""
