"""What pytest cannot collect everywhere."""

import importlib.util

# Its doctests need PyTorch, which is optional.
collect_ignore = [] if importlib.util.find_spec("torch") else ["numbanorm/torch.py"]
