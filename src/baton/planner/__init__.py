"""What the user should run: reads his traffic, measures or looks up the hardware, and decides."""
