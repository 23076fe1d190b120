"""Methods to compare with: they lose far more than coding at equal bytes, and mea compress does not offer them."""
