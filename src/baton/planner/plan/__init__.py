"""The search for a deployment: which workers, of what, how many, and whether to split at all.

kinds ─▶ candidates ─▶ bounds (arithmetic: prunes) ─▶ trials (the twin: decides)
                               └─▶ flips                  └─▶ verdict ─▶ report, plan.yaml
"""
