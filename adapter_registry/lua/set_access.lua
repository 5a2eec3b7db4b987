-- Say who else may call an adapter. KEYS: versions, access. ARGV: access as JSON. Answers 1, or 0 when there is none.
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call('SET', KEYS[2], ARGV[1])
return 1
