"""From traffic, hardware and prices to a verdict, and the measurements that it rests on.

No torch here: a plan is made on any laptop. What must run a model is in `engine`.
"""
