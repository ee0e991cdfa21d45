"""The sum over tokens, the factorization and the solve on several devices."""
