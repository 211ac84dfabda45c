"""The live server: one WebSocket per viewer, one model for all of them. `create_app` is the way in."""
