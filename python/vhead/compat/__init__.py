"""Lets code that imports these classes from another package run on vhead, unchanged and on request only."""
