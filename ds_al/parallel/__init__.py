"""Process groups: the world, the place of a rank in it, and the data parallel replicas of a stage."""
