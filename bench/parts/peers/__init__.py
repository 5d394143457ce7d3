"""One engine a module, each a process of its own that measures a cell when it is asked to.

`child` and the `run_*` modules but Baton's own import nothing of Baton: some of them run in other
environments. `cells` says what is measured and what it costs at least, `engines` starts the
processes, `table` prints.
"""
