"""From judged samples to a page: statistics, figures, tables. Nothing in here samples, judges or trains.

`load` reads folders, `study` says what may be compared, `responses` counts, `statistics` computes, `conclusion` says it
in a sentence, `figures` draws, `page` writes.
"""
