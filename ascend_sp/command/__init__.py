"""The commands of ``python -m ascend_sp``, one a file."""
