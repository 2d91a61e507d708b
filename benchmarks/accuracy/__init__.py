"""Does compressed training converge where dense training does, at equal bytes?"""
