"""Device meshes, sharding rules, and jobs of several processes."""
