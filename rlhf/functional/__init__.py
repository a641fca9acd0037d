"""Pure tensor maths: tensors in, tensors or a NamedTuple out; no configuration, no model, no logging.

Shapes: B episodes, T response tokens, V vocabulary. Masks are bool; True counts.
"""
