"""The flow-matching maths of the library: pure functions on tensors, t = 0 is data and t = 1 is noise."""
