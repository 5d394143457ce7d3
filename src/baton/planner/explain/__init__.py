"""One request explained from the decision logs of the run that served it.

gateway's log ─▶ history: every request's way, and the candidates of the one in question
workers' logs ─▶ facts: what their steps, copies and fetches took, and how long answers were
both          ─▶ what_if: the twin, led to that placement and turned elsewhere
all           ─▶ explanation
"""
