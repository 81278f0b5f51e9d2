"""One run from outside: compose, refuse, start, watch, resume. None of veRL's trainers, workers or engines in here."""
