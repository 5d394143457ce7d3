"""Traces of traffic, in every form that Baton reads, as lists of `TraceRequest`.

`source` opens files and cuts them into lines, `checks` turns what stands in them into numbers or
into a sentence that says what to change, `trace` is what comes out, `detect` chooses the reader.
One module a form; each says in its docstring what the form looks like.
"""

from baton.planner.traces.detect import FORMATS, read_trace
from baton.planner.traces.trace import Trace, spread

__all__ = ["FORMATS", "Trace", "read_trace", "spread"]
