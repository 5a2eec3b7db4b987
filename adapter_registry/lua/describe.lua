-- Adapters as one moment saw them. KEYS: versions, aliases and access of each adapter, in threes.
local answer = {}
for i = 1, #KEYS, 3 do
  answer[#answer + 1] = {
    redis.call('HGETALL', KEYS[i]), redis.call('HGETALL', KEYS[i + 1]), redis.call('GET', KEYS[i + 2]) or '',
  }
end
return answer
