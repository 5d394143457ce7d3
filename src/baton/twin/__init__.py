"""The twin: the real policy objects on a virtual clock; no torch, no sockets."""
