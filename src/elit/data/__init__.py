"""Image sets as (images in [-1, 1], integer labels), and the order they are drawn in."""
