"""What a trace says about its traffic: the figures that a layout is chosen by, and their page.

`lengths`, `arrivals` and `sharing` are counts of the trace alone. `phases` adds a cost model: what
prefill and decode take of compute, time, money and energy. `claims` holds the field's rules of
thumb against all of it. `analysis` puts them together; `tables` and `page` show it.
"""

from baton.planner.analyze.analysis import Analysis, analyze

__all__ = ["Analysis", "analyze"]
