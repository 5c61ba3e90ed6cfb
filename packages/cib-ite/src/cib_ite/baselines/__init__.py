"""What the method is compared to: `classical` ones, and `external` packages behind the same interface."""
