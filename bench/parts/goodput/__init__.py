"""The pieces of `bench/goodput.py`: what is sent, how it is judged, what is measured next."""
