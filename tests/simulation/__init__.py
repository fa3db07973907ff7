"""The library's core in virtual time, with all that can go wrong. See README.md."""
