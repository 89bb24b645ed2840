"""The models, on flat packed tensors: pi-0.5, GR00T N1.5, the towers that they are made of."""
