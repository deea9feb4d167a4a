"""The Lightning shell: hooks, data loaders, trainers, files. What a repair is stands outside of it and knows it not."""
