"""placeholder"""
def compare_servers(*a): raise NotImplementedError
