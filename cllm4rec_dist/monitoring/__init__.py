"""What a run says of itself while it trains, and what can be seen of it from elsewhere."""
