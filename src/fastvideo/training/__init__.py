"""Training of the bundled sprite model with rectified flow, on one device."""
