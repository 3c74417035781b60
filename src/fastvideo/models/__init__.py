"""Video models built from the attention layers, and the flow matching that trains and samples them."""
