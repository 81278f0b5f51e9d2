"""From published problem sets to veRL's parquet, checked row by row. No sampling and no training in here."""
