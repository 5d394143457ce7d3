"""How KV blocks leave one worker and reach another: the store's memory and its transports.

The policy (which key in which frame, whose lease) is in `core.store_index` and `core.lease`.
"""
