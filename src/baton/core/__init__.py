"""Every decision, and nothing else.

Plain synchronous objects: no torch, no asyncio, no sockets, no clock, no randomness. Time and
seeds come in as arguments. The server, the simulator and the fault tests drive the same objects.
"""
