"""From published problem sets to veRL's parquet, checked row by row. No sampling and no training in here.

`sources` reads files and the hub, `layouts` tells question and answer from a publisher's columns, `chat` is what a
model sees, `overlap` finds a copy again, `validate` says what must not be used, `prepare` writes.
"""
