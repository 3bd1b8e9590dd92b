"""From encoded bytes to crops: the backends and the choice among them."""
