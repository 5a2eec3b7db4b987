-- Adapters as one moment saw them. KEYS: versions, aliases, access and splits of each, in fours.
local answer = {}
for i = 1, #KEYS, 4 do
  answer[#answer + 1] = {
    redis.call('HGETALL', KEYS[i]), redis.call('HGETALL', KEYS[i + 1]), redis.call('GET', KEYS[i + 2]) or '',
    redis.call('HGETALL', KEYS[i + 3]),
  }
end
return answer
