"""What a layer is: its rules, its cases, and what families of layers share."""
