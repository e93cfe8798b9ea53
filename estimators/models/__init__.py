"""Models that are priced: names, shapes and configurations, from wherever they are known."""
