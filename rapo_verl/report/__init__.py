"""From judged samples to a page: statistics, figures, tables. Nothing in here samples, judges or trains."""
