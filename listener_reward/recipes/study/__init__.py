"""Experiments as data: what is compared, from which seeds, is written down beforehand; every run is one JSON file.

`configuration` says what decides a run's result, `plans` reads a study's file, `runs` keeps finished runs, `carry_out`
makes one, `conduct` makes all that are missing, and `results` turns what is there into tables and figures.
"""
