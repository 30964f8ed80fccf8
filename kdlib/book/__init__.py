"""The press: notebooks in, pages out. It may import all of kdlib; nothing in kdlib imports it.

`page`, `plots` and `reference` are what a notebook uses, and need no package of the book's.
"""
