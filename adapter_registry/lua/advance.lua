-- Compare and set: the schema of the data. KEYS: schema. ARGV: as it was, as it is now.
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('SET', KEYS[1], ARGV[2]) end
return 1
