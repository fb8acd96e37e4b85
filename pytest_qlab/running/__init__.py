"""A pytest run: its settings and labs, parametrization, what tests send back, the controller."""
