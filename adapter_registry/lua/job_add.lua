-- Keep a new job and count it as a user of its files. KEYS: jobs, order, files, uses. ARGV: id, record, file ids...
-- Answers '' or the id of a file that is not there.
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 1 then return '' end
for i = 3, #ARGV do
  if redis.call('HEXISTS', KEYS[3], ARGV[i]) == 0 then return ARGV[i] end
end
for i = 3, #ARGV do redis.call('HINCRBY', KEYS[4], ARGV[i], 1) end
local last = redis.call('ZREVRANGE', KEYS[2], 0, 0, 'WITHSCORES')
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], (tonumber(last[2]) or 0) + 1, ARGV[1])
return ''
