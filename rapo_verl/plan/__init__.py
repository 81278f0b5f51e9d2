"""What a run will need of its GPUs, by arithmetic on a config (`rapo plan`). Nothing in here starts anything."""
