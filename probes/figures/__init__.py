"""What figures are drawn with; imported to draw."""
