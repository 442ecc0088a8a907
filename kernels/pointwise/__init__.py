"""The elementwise layers, one class of ``reference`` each."""
