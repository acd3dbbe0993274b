"""What analyses measure with: cosines, matching, components, ranks, choices, intervals."""
