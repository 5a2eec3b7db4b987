-- Adapters as one moment saw them. KEYS: versions, aliases, access, splits and guards of each, in fives.
local answer = {}
for i = 1, #KEYS, 5 do
  answer[#answer + 1] = {
    redis.call('HGETALL', KEYS[i]), redis.call('HGETALL', KEYS[i + 1]), redis.call('GET', KEYS[i + 2]) or '',
    redis.call('HGETALL', KEYS[i + 3]), redis.call('HGETALL', KEYS[i + 4]),
  }
end
return answer
