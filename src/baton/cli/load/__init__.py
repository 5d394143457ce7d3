"""An open-loop load generator for any OpenAI-compatible server; no torch.

`workload` says when which request arrives, `prompts` what it says, `client` sends it and notes
when tokens arrive, `metrics` does the arithmetic, `sweep` raises the rate, `report` prints.
"""
